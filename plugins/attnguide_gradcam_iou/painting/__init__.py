"""Internal: the page of `attnguide annotate`, on which masks are painted.

- `sheets`: the sheets to paint on, images or a template;
- `store`: the folder of masks;
- `import_export`: LabelMe and COCO;
- `watching`: attribution maps of a model;
- `parts`: regions that can be added to a mask;
- `tuning`: fine-tuning in the background;
- `server`: the server; `page/` holds the page itself.

Only `watching`, `parts` and `tuning` import torch; they are imported when they are used.
"""
