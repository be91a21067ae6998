"""Between the stages: frozen values and the pure decisions about them (dirty ranges, lineage, retention, plans)."""
