"""Generation and grading on a Ray cluster; the driver keeps the books."""
