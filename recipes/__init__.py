"""Recipes that make the files which the package ships."""
