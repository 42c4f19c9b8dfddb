"""Fewer hidden channels: removes channels between layers and refits the layers that read them."""
