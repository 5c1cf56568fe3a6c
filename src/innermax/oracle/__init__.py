"""The network as the attacker sees it: folded, lowered, compiled, sharded."""
