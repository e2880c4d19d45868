"""What policies are composed of: cache rules, assignment rules. Free functions over arrays."""
