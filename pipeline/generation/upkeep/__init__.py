"""What is done with a run that is made: checked, mended, made again in part, watched, and taken down in part."""
