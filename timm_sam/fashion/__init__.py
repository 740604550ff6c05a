"""Fashion-MNIST as an image folder."""
