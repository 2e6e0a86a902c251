"""Choose the vision-language data that make a robot policy learn better."""
__version__ = "0.1.0"
