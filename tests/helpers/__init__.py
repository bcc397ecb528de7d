"""What several test files need, by subject. Test files import from here, never from one another."""
