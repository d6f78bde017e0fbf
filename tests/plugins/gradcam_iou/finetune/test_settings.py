"""Settings of fine-tuning come from arguments or from the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.models import cnn
from tests.plugins.gradcam_iou.samples import (
    corner,
    samples,
)

from attnguide.errors import InputError
from attnguide_gradcam_iou.finetune import finetune


def test_settings_come_from_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[guide]\nlayer = "block3"\n[train]\nepochs = 2\nlearning_rate = 0.001\nbatch_size = 4\n')
    assert len(finetune(cnn(), samples(8), template=corner(), recipe=file)) == 2
    file.write_text("[train]\nepochs = 2\n")
    with pytest.raises(InputError, match=r"'mine' has no learning_rate.*Give learning_rate="):
        finetune(cnn(), samples(8), template=corner(), recipe=file)
    file.write_text('[train]\nepochs = "many"\n')
    with pytest.raises(InputError, match=r"epochs='many' of recipe 'mine'"):
        finetune(cnn(), samples(8), template=corner(), recipe=file)
