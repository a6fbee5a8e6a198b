"""The main job: norms side by side on one data set."""
