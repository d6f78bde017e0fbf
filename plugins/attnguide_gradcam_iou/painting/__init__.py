"""The page on which masks are painted: `attnguide annotate`.

- `sheets`: what is painted on, images or a template;
- `store`: where the masks are kept;
- `import_export`: LabelMe and COCO;
- `watching`: what a model looks at;
- `parts`: the parts of a face;
- `tuning`: fine-tuning in the background;
- `server`: the server, and `page/`, what the browser gets.

Only `watching`, `parts` and `tuning` import torch, once what they do is asked for.
"""
