"""Datasets that are not COCO's, YOLO's and Pascal VOC's, read as COCO documents."""
