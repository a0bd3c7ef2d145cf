"""The networks that can be trained, those of the user among them."""
