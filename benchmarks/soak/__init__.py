"""A server at work for a long time, watched for what it does not give back: `make soak`."""
