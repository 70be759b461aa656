"""The statistics of ImageNet's pixels, per RGB channel, in uint8 units."""

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
# The mean colour as a pixel: what lies beyond the edge of a picture.
FILL = (124, 116, 104)
