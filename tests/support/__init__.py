"""What the tests share: inputs, oracles, judges, processes and builds. No file here holds a test."""
