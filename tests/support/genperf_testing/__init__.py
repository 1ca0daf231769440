"""What the tests share: the backends to run on, the cases of the ops, and the contract that they keep."""
