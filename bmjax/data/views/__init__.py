"""Random views of training images, on the device."""
