"""The parts that measure: devices, peers, problems, parity, results, and the runner of the suites."""
