"""The parts the three scripts are made of; each file imports only files of the floors below its own (see README)."""
