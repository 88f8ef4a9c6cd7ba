"""Guarded views: the walk of one request, module by module.

When a view is defined (or on the first request, for ``GUARDED_VIEWS``)::

    decorators.meterly_guard ─────┐
    middleware ── patterns ───────┴► guarding.guard_view ─┬► functions.guard_function
    mixins.MeterlyGuardMixin ─────────────────────────────┴► classes.guard_class

For each request, the wrapper of ``guard_function`` calls, in this order:

1. ``admission.Admission.admit`` reads the options, finds the customer (``keys`` reads
   the idempotency key of the request) and reserves: ``lifecycle``, then ``journal``.
   ``responses`` renders a refusal.
2. ``atomic`` opens the transactions of ``ATOMIC_REQUESTS``.
3. ``execution.Execution.run`` runs the view and concludes. ``streams`` concludes after
   the last chunk, ``patches.extend_render`` after rendering.

In front of that, ``guard_class`` lets a class's ``dispatch()`` find the handler first;
``dispatch`` is what the two wrappers tell each other.

The others are read by several of these: ``introspection`` (what a view is), ``methods``
(which HTTP methods cost something) and ``patches`` (every change to objects of others).
"""
