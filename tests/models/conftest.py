"""The oracles are scripts with dependencies of their own; pytest need not look at them."""

collect_ignore_glob = ["oracles/*"]
