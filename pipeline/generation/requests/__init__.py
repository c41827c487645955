"""What an operator asks for, and the images that an edit starts from."""
