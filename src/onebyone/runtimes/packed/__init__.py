"""The packed runtime: a traced network whose weights are packed once for oneDNN."""
