"""Who makes the processes of a run on this node, and torch's agent."""
