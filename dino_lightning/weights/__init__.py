"""Weights from files and addresses: downloaded, read safely, identified, renamed to our entries, loaded into a model.

`loading.load_initial_weights(model, place)` is the entry point of training (`--model.weights`). In this order it uses:

0. `zoo.fetch` for a name of the table `zoo.yaml`, and `shipped.shipped_file` for one of this package: the file.
1. `download.local_file`: a path as it is; an `https://`, `hf://` or `s3://` address is downloaded once, into a cache.
2. `reading.read_weights`: the file -> `LoadedWeights` under our names, without running code from the file.
3. `published_layout`, called by `reading` for published DINO, Swin and ConvNeXt files: their names and shapes -> ours;
   before it, `foreign_layouts` for detrex's and mmdetection's: their names and shapes -> published ones.
4. `loading` itself: class heads matched by name, all entries copied into the model; `backbone_loading` for a backbone
   alone, of which torchvision and timm have weights, too; a `load_report.LoadReport` of what was loaded.
5. `sizes.differences`, if the architectures differ: the options that would make the model fit the file.

`python -m dino_lightning convert` uses `download`, `reading`, `sizes` and, to write, `published_layout.to_published`
and `foreign_layouts.from_official`.
Whatever only needs the content of a checkpoint calls `reading.read_checkpoint`. All of them raise `CheckpointError`.
"""
