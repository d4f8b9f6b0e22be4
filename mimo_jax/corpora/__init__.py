"""Small corpora to train on: sentences spoken here (`synthetic`), recorded speech from Debian packages (`debian`)."""
