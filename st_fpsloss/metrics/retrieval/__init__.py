"""The retrieval metric module: ``evaluate.load(st_fpsloss.metrics.metric_path())`` reads ``retrieval.py`` in here."""
