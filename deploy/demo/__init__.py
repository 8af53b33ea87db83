"""Trains the two tiny language models that Mobula ships as its embedded default: `python -m deploy.demo.train`."""
