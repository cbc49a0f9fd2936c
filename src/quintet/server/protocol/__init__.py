"""What bodies of requests and answers are, in the words of each protocol."""
