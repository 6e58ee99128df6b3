"""From images and class names to label maps: the one path that everything here uses."""
