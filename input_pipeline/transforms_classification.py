"""Augmentations of image classification."""


def classification_transforms():
  return []
