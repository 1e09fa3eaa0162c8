"""More than one GPU, and engines: what outgrows the six scripts."""
