"""The YAML tree that Hydra composes; a package only so that an installed `opd` finds it."""
