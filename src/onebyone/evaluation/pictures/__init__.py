"""Test examples as pictures, with what two networks give for them."""
