"""Networks of an encoder file, applied: a segmenter to whole scans, an encoder to crops."""
