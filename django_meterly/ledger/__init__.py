r"""The embedded ledger: a Meterly server inside your Django project.

It knows workspaces, customers, their accounts and the holds on them. Every change of a
balance writes an *entry*, a row that is never changed. This is who calls whom::

    transport (in process)    urls, api/, authentication (REST)
              \                       /
                      service            check, carry out, render
              /          |         \
       customers      grants     spending      the operations
                         |       /      \
                     portable     postgresql   move credits (see movements)

============  ====================================================================
expiry        Expires holds, for ``spending`` and for the sweep.
refusals      Turns the codes of ``movements`` into errors.
results       The values that operations return.
idempotency   Finds an earlier call with the same key.
database      The alias of the database, and how an operation is repeated.
models        The tables and their constraints.
append_only   Entries, seals and key events are never changed: in Python ...
triggers      ... and in the database.
seals         Chains the entries by hashes, so that a change can be proved.
verification  Compares balances, holds, entries and seals.
============  ====================================================================

``service`` says how to add an operation.
"""
