"""How well incidents are diagnosed: Longwatch beside published rules, on labelled runs."""
