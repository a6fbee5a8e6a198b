"""What runs have written: as data frames, as files of other programs, on dashboards."""
