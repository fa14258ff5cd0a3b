"""The inside of `annotation_file` and `splits`: JSON files entry by entry, ids, names and values of other programs."""
