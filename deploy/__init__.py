"""What runs Longwatch for real: units, manifests, alert rules, dashboards."""
