"""What a run is: typed schemas, the Hydra tree of recipes, and the errors users see."""
