"""What trained weights are like: how sharp the loss is around them."""
