"""Published checkpoint files → bundles: reading them safely, what they hold, and a cache of the well-known ones."""
