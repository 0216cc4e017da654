"""Acting: everything that turns a prompt and a policy into tokens."""
