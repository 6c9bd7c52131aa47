"""A zoo: clean and backdoored encoders that anyone can build again from a recipe, with what was measured."""

from encoderguard.zoo.build import build_zoo
from encoderguard.zoo.cells import Site
from encoderguard.zoo.manifest import Entry, Manifest, find_manifests, read_manifest
from encoderguard.zoo.pictures import Pictures
from encoderguard.zoo.recipe import Cell, ZooRecipe, read_recipe

__all__ = [
    "Cell",
    "Entry",
    "Manifest",
    "Pictures",
    "Site",
    "ZooRecipe",
    "build_zoo",
    "find_manifests",
    "read_manifest",
    "read_recipe",
]
