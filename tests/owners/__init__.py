"""A project whose customers belong to a model of its own, of one kind or another.

``python -m tests.owners Team`` tells a story with ``CUSTOMER_MODEL`` set to that model
of ``models.py``, and ends with 0 if everything went as it should.
"""
