"""The customer mirror, the grants, and the journal of reservations."""

from __future__ import annotations

import hashlib
import logging
import uuid
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import IntegrityError, connections, models, router, transaction
from django.utils.translation import gettext_lazy as _

from . import units
from .conf import meterly_settings
from .db import ExactCharField, MomentField, from_now
from .errors import (
    MeterlyCustomerExistsError,
    MeterlyError,
    MeterlyUnknownOutcomeError,
)
from .wire import (
    MAX_CALLER_KEY_LENGTH,
    MAX_KEY_LENGTH,
    MAX_TEXT_LENGTH,
    check_text,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .client import MeterlyClient
    from .errors import MeterlyInsufficientCreditsError

logger = logging.getLogger(__name__)

if not apps.is_installed("django_meterly"):
    raise ImproperlyConfigured(
        "django-meterly is not installed. Add 'django_meterly' to INSTALLED_APPS and "
        "run migrate."
    )

UNIT_LENGTH = 64
MAX_REASON_LENGTH = 500
ID_LENGTH = 64


def external_id_of(owner: models.Model) -> str:
    """Return what ``EXTERNAL_ID`` returns for *owner*.

    Raises ``ValueError`` if that cannot be an external id.
    """
    external_id = meterly_settings.EXTERNAL_ID(owner)
    return check_text(external_id, "What METERLY['EXTERNAL_ID'] returns")


def _names(external_id: str) -> Iterator[str]:
    """Yield *external_id*, then ``external_id~2`` and so on, for when it is taken."""
    yield external_id
    for number in count(2):
        suffix = f"~{number}"
        yield external_id[: MAX_TEXT_LENGTH - len(suffix)] + suffix


def _described(value: Any) -> str:
    # Not the __str__ of a project's model, which may raise or query the database.
    return value._meta.label if isinstance(value, models.Model) else shown(value)


@cache
def select_sql(using: str, name: str) -> str:
    """Return the SELECT of the customer whose field *name* has one value.

    It names its columns, because a later version may add one while this process runs.
    """
    quote = connections[using].ops.quote_name
    fields = {f.name: quote(str(f.column)) for f in Customer._meta.concrete_fields}
    columns = ", ".join(fields.values())
    table = quote(Customer._meta.db_table)
    return f"SELECT {columns} FROM {table} WHERE {fields[name]} = %s"  # noqa: S608


def wire_scope_sql(external_id: str) -> str:
    """Return PostgreSQL's expression for the ``wire_scope`` of an *external_id*."""
    digest = f"encode(sha256(convert_to({external_id}, 'UTF8')), 'hex')"
    return f"left({digest}, {_SCOPE_LENGTH})"


_SCOPE_LENGTH = 12


@cache
def _converters(using: str) -> dict[int, tuple[list[Any], Any]]:
    """Return the converters of a customer's columns, by the number of the column."""
    table = Customer._meta.db_table
    compiler: Any = Customer.objects.using(using).query.get_compiler(using)
    converters: dict[int, tuple[list[Any], Any]] = compiler.get_converters(
        [field.get_col(table) for field in Customer._meta.concrete_fields]
    )
    return converters


class CustomerQuerySet(models.QuerySet["Customer"]):
    def for_owner(self, owner: models.Model) -> Customer:
        """Return the customer of *owner*, an instance of ``CUSTOMER_MODEL``.

        It is looked up by its owner. On first use it is registered under the external
        id that ``EXTERNAL_ID`` returns. If that id belongs to another owner, living or
        deleted, the new customer gets the next free one: ``user_5~2``, ``user_5~3``.
        A customer that was registered by its external id, and never had an owner, gets
        this one.

        Two first uses at once make one row. Raises ``TypeError`` for an object of
        another model, and ``ValueError`` if *owner* is not saved, or if
        ``EXTERNAL_ID`` returns something that cannot be an external id.
        """
        key = Customer.owner_key(owner)
        return self._known("owner", key) or self._register(key, external_id_of(owner))

    async def afor_owner(self, owner: models.Model) -> Customer:
        """Return the customer of *owner*: the async twin of ``for_owner``."""
        return await sync_to_async(self.for_owner)(owner)

    def free_external_id(self, owner: models.Model) -> str:
        """Return the external id under which *owner* would be registered now."""
        derived = external_id_of(owner)

        def is_free(name: str) -> bool:
            known = self._known("external_id", name)
            return known is None or (name == derived and not known.had_owner)

        return next(filter(is_free, _names(derived)))

    def resolve(self, value: Any) -> Customer:
        """Return the customer that *value* stands for.

        *value* is a ``Customer``, an instance of ``CUSTOMER_MODEL`` (see
        ``for_owner``) or an external id. An external id finds the customer of that
        name, even if the owner was deleted, or makes one without an owner. For example,
        ``Customer.objects.resolve("team_7")``. Raises ``TypeError`` for anything else,
        and ``ValueError`` for a string that cannot be an external id.
        """
        name, key = Customer.identify(value)
        if name == "owner":
            return self.for_owner(value)
        if name == "external_id":
            return self._known(name, key) or self._add(key)
        self._for_write = True
        # A row can only refer to a customer that comes from the same database.
        return value if value.fits(self.db) else self.get(pk=key)

    async def aresolve(self, value: Any) -> Customer:
        """Return the customer that *value* stands for: ``resolve``'s async twin."""
        return await sync_to_async(self.resolve)(value)

    def update(self, **fields: Any) -> int:
        """Update the customers; if that sets an owner, set ``had_owner``, too."""
        if any(fields.get(name) is not None for name in ("owner", "owner_id")):
            fields["had_owner"] = True
        return super().update(**fields)

    update.alters_data = True  # type: ignore[attr-defined]

    def bulk_create(self, objs: Iterable[Customer], *args: Any, **kwargs: Any) -> Any:
        """Insert *objs*; set ``had_owner`` of those with an owner."""
        customers = list(objs)
        for customer in customers:
            customer.ensure_external_id()
            customer.note_owner()
        return super().bulk_create(customers, *args, **kwargs)

    bulk_create.alters_data = True  # type: ignore[attr-defined]

    def _known(self, name: str, value: Any) -> Customer | None:
        # By hand: Django takes longer to build this frequent query than the database
        # takes to answer it.
        self._for_write = True
        field: Any = Customer._meta.get_field(name)
        parameter = field.get_db_prep_value(value, connections[self.db])
        return next(iter(self.raw(select_sql(self.db, name), [parameter])), None)

    def _register(self, owner_id: Any, external_id: str) -> Customer:
        names = _names(external_id)
        name = next(names)
        known = self._known("external_id", name)
        while True:
            try:
                with transaction.atomic(using=self.db):
                    if known is None:
                        return self.create(owner_id=owner_id, external_id=name)
                    if name == external_id and not known.had_owner:
                        unowned = self.filter(pk=known.pk, had_owner=False)
                        if unowned.update(owner=owner_id):
                            return self.get(pk=known.pk)
            except IntegrityError:
                # Somebody was faster: for the same owner, or with this external id.
                winner = self._winner(owner_id=owner_id, external_id=name)
                if winner is None:
                    raise
                if winner.owner_id == owner_id:
                    return winner
                if known is None:
                    known = winner
                    continue
            if known.owner_id is not None:
                logger.warning(
                    "METERLY['EXTERNAL_ID'] returns %r for two owners. The second one "
                    "gets another external id.",
                    name,
                )
            name = next(names)
            known = self._known("external_id", name)

    def _add(self, external_id: str) -> Customer:
        try:
            with transaction.atomic(using=self.db):
                return self.create(external_id=external_id)
        except IntegrityError:
            if winner := self._winner(external_id=external_id):
                return winner
            raise

    def _winner(self, **lookups: Any) -> Customer | None:
        """Return the customer of the first of *lookups* that finds one."""
        # The second try locks: without it, MySQL may read its transaction's snapshot.
        # The first does not, because a lock on a missing row blocks others' inserts.
        for customers in (self.all(), self.select_for_update()):
            with transaction.atomic(using=self.db):
                for lookup in lookups.items():
                    if found := customers.filter(lookup).first():
                        return found
        return None


class Customer(models.Model):
    """A customer, who pays with credits: your external id, and the ledger's id."""

    owner = models.OneToOneField(
        meterly_settings.owner_model(),
        verbose_name=_("owner"),
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
    )
    had_owner = models.BooleanField(
        _("has had an owner"),
        default=False,
        editable=False,
        help_text=_("Then nobody else becomes the owner when this one is deleted."),
    )
    external_id = ExactCharField(
        _("external id"), max_length=MAX_TEXT_LENGTH, unique=True
    )
    customer_id = ExactCharField(
        _("customer id"),
        max_length=ID_LENGTH,
        null=True,
        blank=True,
        unique=True,
        editable=False,
        help_text=_("The ledger's id, known from the first use on."),
    )
    owes = models.BooleanField(
        _("owes credits"),
        default=False,
        editable=False,
        help_text=_("Whether a reservation of this customer may be a debt."),
    )
    created_at = MomentField(_("created at"), auto_now_add=True)

    objects = CustomerQuerySet.as_manager()

    class Meta:
        verbose_name = _("customer")
        verbose_name_plural = _("customers")
        permissions = [("grant_credits", _("Can grant credits"))]
        constraints = [
            models.CheckConstraint(
                # SQL of the project that sets the owner must set had_owner, too.
                condition=models.Q(owner=None) | models.Q(had_owner=True),
                name="meterly_customer_had_owner",
            ),
            models.CheckConstraint(
                condition=~models.Q(external_id=""), name="meterly_customer_named"
            ),
        ]

    def __str__(self) -> str:
        return str(self.external_id)

    def save(self, *args: Any, update_fields: Any = None, **kwargs: Any) -> None:
        if self._state.adding:
            self.ensure_external_id()
        if self.note_owner() and {"owner", "owner_id"} & set(update_fields or ()):
            update_fields = {*update_fields, "had_owner"}
        super().save(*args, update_fields=update_fields, **kwargs)

    def clean(self) -> None:
        super().clean()
        self.note_owner()

    @staticmethod
    def owner_model() -> type[models.Model]:
        """Return the model of ``CUSTOMER_MODEL``; for a proxy, its concrete model."""
        model: Any = Customer._meta.get_field("owner").related_model
        return model._meta.concrete_model  # type: ignore[no-any-return]

    @classmethod
    def from_columns(cls, using: str, columns: Sequence[Any]) -> Customer:
        """Return the customer whose *columns* a statement on *using* has read.

        The *columns* are those of ``select_sql``.
        """
        connection, columns = connections[using], list(columns)
        for number, (converters, expression) in _converters(using).items():
            for convert in converters:
                columns[number] = convert(columns[number], expression, connection)
        names = [field.attname for field in cls._meta.concrete_fields]
        return cls.from_db(using, names, columns)

    @staticmethod
    def identify(value: Any) -> tuple[str, Any]:
        """Return the field by which *value* finds a customer, and the field's value.

        For example, ``("external_id", "team_7")`` for the text ``"team_7"``. Raises
        what ``CustomerQuerySet.resolve`` raises.
        """
        if isinstance(value, Customer):
            return "id", value.pk
        if isinstance(value, str):
            return "external_id", check_text(value, "external_id")
        if isinstance(value, Customer.owner_model()):
            return "owner", Customer.owner_key(value)
        raise TypeError(
            "A customer is a Customer, an instance of "
            f"{meterly_settings.CUSTOMER_MODEL} or an external id, not "
            f"{_described(value)}. For views, METERLY['CUSTOMER_RESOLVER'] returns who "
            "pays."
        )

    def fits(self, using: str) -> bool:
        """Return whether rows of the database *using* can be tied to this instance."""
        return self._state.db in (None, using)

    @staticmethod
    def owner_key(owner: Any) -> Any:
        """Return the ``Customer.owner_id`` of *owner*.

        Raises ``TypeError`` unless it is an instance of ``CUSTOMER_MODEL``, and
        ``ValueError`` unless it is saved.
        """
        model = Customer.owner_model()
        if not isinstance(owner, model):
            raise TypeError(
                f"The owner of a customer is an instance of {model._meta.label} "
                f"(METERLY['CUSTOMER_MODEL']), not {_described(owner)}. Pass the "
                f"{model._meta.object_name} that pays."
            )
        # Not its pk: a child of the model may have another one.
        key = getattr(owner, Customer._meta.get_field("owner").target_field.attname)
        if key is None or owner._state.adding:
            raise ValueError(
                f"This {model._meta.label} is not in the database: save it before it "
                "becomes a customer."
            )
        return key

    def note_owner(self) -> bool:
        """Set ``had_owner`` if this customer has an owner; return whether it has."""
        # A deferred owner is not loaded: had_owner was set when it was saved.
        if self.__dict__.get("owner_id") is None:
            return False
        self.had_owner = True
        return True

    def ensure_external_id(self) -> None:
        """Give a new customer without an external id the one of its owner.

        Raises ``ValueError`` for one that cannot be an external id.
        """
        if not self.external_id and self.owner is not None:
            self.external_id = Customer.objects.free_external_id(self.owner)
        check_text(self.external_id, "external_id")

    @property
    def wire_scope(self) -> str:
        """The prefix of this customer's keys on the wire.

        The ledger's keys are unique in a workspace. A caller's keys are only unique for
        each customer, so the prefix keeps them apart.
        """
        return hashlib.sha256(self.external_id.encode()).hexdigest()[:_SCOPE_LENGTH]

    def register(self, client: MeterlyClient, unit: str) -> str:
        """Return the ledger's id, registering the customer there on first use.

        *unit* becomes the default unit of a new customer. Two first uses at
        once end with one customer: the ledger deduplicates by external id.
        Raises what ``create_customer`` raises, ``ValueError`` for a unit that
        ``UNITS`` does not declare, and ``MeterlyUnknownOutcomeError`` if the ledger
        names no id, or that of another customer.
        """
        return self.ensure_registered(client, units.check_declared(unit))

    def ensure_registered(self, client: MeterlyClient, unit: str) -> str:
        """Do the same as ``register``, for a *unit* that was checked before."""
        if self.customer_id:
            return str(self.customer_id)
        try:
            customer_id = client.create_customer(self.external_id, unit).customer_id
        except MeterlyCustomerExistsError as exc:
            customer_id = exc.customer_id
            if not customer_id:
                raise MeterlyUnknownOutcomeError(
                    f"The ledger knows {self.external_id!r}, but not by a valid id."
                ) from exc
        self.learn(customer_id)
        return customer_id

    def learn(self, customer_id: str) -> None:
        """Store *customer_id*, the ledger's id of this customer.

        Raises ``MeterlyUnknownOutcomeError`` if this customer has another one, or if it
        belongs to another customer.
        """
        if self.customer_id == customer_id:
            return
        if self.customer_id:
            raise MeterlyUnknownOutcomeError(
                f"The ledger knew {self.external_id!r} as {self.customer_id}, and now "
                f"as {customer_id}."
            )
        using = router.db_for_write(Customer)
        try:
            with transaction.atomic(using=using):
                Customer.objects.using(using).filter(pk=self.pk).update(
                    customer_id=customer_id
                )
        except IntegrityError as exc:
            raise MeterlyUnknownOutcomeError(
                f"The ledger knows {self.external_id!r} as {customer_id}, which is "
                "another customer."
            ) from exc
        self.customer_id = customer_id

    def register_again(self, client: MeterlyClient, unit: str) -> None:
        """Replace an id that the ledger does not know by the one that it answers.

        The old id stays if the ledger does not answer with one: a wrong ``BASE_URL``
        must not make the journal forget a customer.
        """
        unknown, self.customer_id = self.customer_id, None
        try:
            self.ensure_registered(client, unit)
        except MeterlyError as exc:
            logger.warning(
                "The ledger does not know the customer %s (%s), and does not register "
                "it again: %s",
                self.external_id,
                unknown,
                exc,
            )
            self.customer_id = unknown


def replace_missing_owner_model() -> None:
    """Let ``Customer.owner`` point to the user model if ``CUSTOMER_MODEL`` is missing.

    Call it when all models are loaded. Without it, the admin raises an exception of
    Django before the check can explain the setting. Guards refuse to run until the
    setting is right.
    """
    owner: Any = Customer._meta.get_field("owner")
    if isinstance(owner.remote_field.model, str):
        try:
            user = apps.get_model(settings.AUTH_USER_MODEL)
        except (LookupError, ValueError):
            return  # Django's own checks report it.
        owner.remote_field.model = user
        owner.do_related_class(user, Customer)


class Grant(models.Model):
    """A grant of credits: who granted how many to whom, and why.

    The row is written before the ledger is asked. If the answer is lost, the sweeper
    asks again with the same key, until the ledger has said yes or no.
    """

    class State(models.TextChoices):
        PENDING = "pending", _("pending")
        GRANTED = "granted", _("granted")
        REFUSED = "refused", _("refused")

    customer = models.ForeignKey(
        Customer, verbose_name=_("customer"), on_delete=models.PROTECT
    )
    unit = ExactCharField(_("unit"), max_length=UNIT_LENGTH)
    amount = models.BigIntegerField(_("amount"))
    reason = models.CharField(_("reason"), max_length=MAX_REASON_LENGTH)
    reference = ExactCharField(_("reference"), max_length=MAX_TEXT_LENGTH)
    actor = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("granted by"),
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
    )
    state = models.CharField(
        _("state"), max_length=16, choices=State.choices, default=State.PENDING
    )
    last_error = models.TextField(_("last error"), blank=True)
    created_at = MomentField(_("created at"), auto_now_add=True)

    class Meta:
        verbose_name = _("grant")
        verbose_name_plural = _("grants")
        constraints = [
            models.UniqueConstraint(
                fields=["customer", "unit", "reference"], name="meterly_grant_once"
            ),
            models.CheckConstraint(
                condition=models.Q(amount__gt=0), name="meterly_grant_positive"
            ),
        ]
        indexes = [
            models.Index(fields=["state", "created_at"], name="meterly_grant_pending")
        ]

    def __str__(self) -> str:
        return f"{units.counted(self.amount, self.unit)} → {self.customer}"

    def stands_for(self, amount: int) -> bool:
        """Return whether a grant of *amount*, under the same reference, is this one.

        A grant that the ledger has refused is never the same: nothing was granted.
        """
        return self.amount == amount and self.state != self.State.REFUSED

    @property
    def wire_key(self) -> str:
        """The idempotency key of this grant's call: customer, unit and reference.

        The row's number is not part of it, because a database may use a number again.
        """
        named = f"{self.unit}:{self.reference}".encode()
        digest = hashlib.sha256(named).hexdigest()[:32]
        return f"{self.customer.wire_scope}:{digest}:grant"


def _noted() -> models.Q:
    """Return the condition of ``Reservation.is_noted``."""
    return models.Q(state=Reservation.State.RELEASED, charge__isnull=False)


class ReservationQuerySet(models.QuerySet["Reservation"]):
    def lapsed(self, older_than: float = 0.0) -> ReservationQuerySet:
        """Open rows whose lease lapsed *older_than* seconds ago or earlier.

        The database's clock decides, here and in the methods below.
        """
        return self.filter(
            state__in=Reservation.State.open(), lease_until__lt=from_now(-older_than)
        )

    def on_trust(self) -> ReservationQuerySet:
        """Rows whose work runs or ran without a hold, and is not paid for yet.

        Every debt is one of them. So is a row whose lease has lapsed, because its work
        may still succeed.
        """
        state = Reservation.State
        running = models.Q(state__in=[state.RESERVED, state.COMMIT_PENDING])
        lapsed = models.Q(state=state.RELEASE_PENDING, lapsed=True)
        unheld = models.Q(reservation_id=None) | models.Q(reservation_id="")
        return self.filter((running | lapsed) & unheld | models.Q(state=state.UNBILLED))

    def debts(self) -> ReservationQuerySet:
        """Unpaid rows, because there were too few credits, the oldest first."""
        unbilled = self.filter(state=Reservation.State.UNBILLED)
        return unbilled.order_by("decided_at", "pk")

    def due(self, older_than: float = 0.0) -> ReservationQuerySet:
        """Decided rows that have waited *older_than* seconds to be carried out.

        Late successes that wait for another attempt's end are among them.
        """
        return self.unsettled().filter(
            stuck_at=None, next_attempt_at__lte=from_now(-older_than)
        )

    def unsettled(self) -> ReservationQuerySet:
        """Decided rows that wait to be carried out, and late successes that wait."""
        pending = models.Q(state__in=Reservation.State.pending())
        return self.filter(_noted() | pending)

    def settled(self, older_than: float = 0.0) -> ReservationQuerySet:
        """Rows that have been final for *older_than* seconds."""
        moment = from_now(-older_than)
        return self.filter(
            ~_noted(),
            models.Q(settled_at__lt=moment) | models.Q(settled_at=None),
            state__in=Reservation.State.final(),
            # For its index.
            created_at__lt=moment,
        )

    def standing(self) -> ReservationQuerySet:
        """Rows that keep their key from being tried again."""
        return self.exclude(state__in=Reservation.State.free(), charge=None)

    def stuck(self) -> ReservationQuerySet:
        """Decided rows that the ledger has refused too often."""
        return self.filter(stuck_at__isnull=False)


class Reservation(models.Model):
    """The journal's row of one attempt at one guarded piece of work.

    It is written before the first byte goes to the ledger, and says what was asked of
    the ledger and what was decided. Only ``django_meterly.journal`` writes it.
    """

    class State(models.TextChoices):
        INTENT = "intent", _("asking the ledger")
        RESERVED = "reserved", _("reserved")
        DENIED = "denied", _("denied")
        FAILED = "failed", _("failed")
        RELEASE_PENDING = "release_pending", _("release pending")
        RELEASED = "released", _("released")
        CONFLICT = "conflict", _("conflict")
        COMMIT_PENDING = "commit_pending", _("commit pending")
        COMMITTED = "committed", _("committed")
        UNBILLED = "unbilled", _("unbilled")

        @classmethod
        def open(cls) -> tuple[Reservation.State, ...]:
            """The states of a row that nobody has decided yet; it has a lease."""
            return (cls.INTENT, cls.RESERVED)

        @classmethod
        def pending(cls) -> tuple[Reservation.State, ...]:
            """The states of a decided row that the ledger has not confirmed yet."""
            return (cls.RELEASE_PENDING, cls.COMMIT_PENDING, cls.UNBILLED)

        @classmethod
        def final(cls) -> tuple[Reservation.State, ...]:
            """The states of a row that is settled."""
            return (cls.DENIED, cls.FAILED, cls.RELEASED, cls.CONFLICT, cls.COMMITTED)

        @classmethod
        def charged(cls) -> tuple[Reservation.State, ...]:
            """The states in which the credits are spent or owed."""
            return (cls.COMMIT_PENDING, cls.COMMITTED, cls.UNBILLED, cls.CONFLICT)

        @classmethod
        def free(cls) -> tuple[Reservation.State, ...]:
            """The states in which nothing was charged and the key is free."""
            return (cls.DENIED, cls.FAILED, cls.RELEASED)

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    customer = models.ForeignKey(
        Customer, verbose_name=_("customer"), on_delete=models.PROTECT
    )
    unit = ExactCharField(_("unit"), max_length=UNIT_LENGTH)
    amount = models.BigIntegerField(_("amount held"))
    charge = models.BigIntegerField(
        _("amount charged"),
        null=True,
        blank=True,
        help_text=_("What is to be charged; empty while the work runs."),
    )
    owed = models.BigIntegerField(
        _("amount owed"),
        null=True,
        blank=True,
        help_text=_(
            "What of the charge there were no credits for. Once the reservation is "
            "committed, this was written off."
        ),
    )
    reference = ExactCharField(_("reference"), max_length=MAX_TEXT_LENGTH)
    name = ExactCharField(
        _("view or task"),
        max_length=MAX_TEXT_LENGTH,
        blank=True,
        default="",
        help_text=_("The view or the task that this was reserved for."),
    )
    key = ExactCharField(_("idempotency key"), max_length=MAX_CALLER_KEY_LENGTH)
    attempt = models.PositiveIntegerField(_("attempt"), default=1)
    ttl_seconds = models.PositiveIntegerField(_("hold time in seconds"))
    state = models.CharField(
        _("state"), max_length=16, choices=State.choices, default=State.INTENT
    )
    reservation_id = ExactCharField(
        _("reservation id"), max_length=ID_LENGTH, null=True, blank=True
    )
    lapsed = models.BooleanField(
        _("lapsed"),
        default=False,
        help_text=_("The lease ran out before anybody decided."),
    )
    fence = models.PositiveIntegerField(
        _("fence"),
        default=0,
        help_text=_("Counts who has claimed the work; only the last may decide."),
    )
    lease_until = MomentField(_("lease until"), null=True, blank=True)
    next_attempt_at = MomentField(_("next attempt at"), null=True, blank=True)
    settle_attempts = models.PositiveIntegerField(_("settle attempts"), default=0)
    refusals = models.PositiveIntegerField(_("refusals"), default=0)
    stuck_at = MomentField(_("stuck since"), null=True, blank=True)
    last_error = models.TextField(_("last error"), blank=True)
    created_at = MomentField(_("created at"), auto_now_add=True)
    decided_at = MomentField(_("decided at"), null=True, blank=True)
    settled_at = MomentField(_("settled at"), null=True, blank=True)

    objects = ReservationQuerySet.as_manager()

    class Meta:
        verbose_name = _("reservation")
        verbose_name_plural = _("reservations")
        permissions = [("write_off_debt", _("Can write off debts"))]
        constraints = [
            models.UniqueConstraint(
                fields=["customer", "key", "attempt"],
                name="meterly_reservation_attempt",
            ),
            models.CheckConstraint(
                condition=models.Q(amount__gt=0), name="meterly_reservation_positive"
            ),
            models.CheckConstraint(
                condition=models.Q(charge=None) | models.Q(charge__gte=0),
                name="meterly_reservation_charge",
            ),
            models.CheckConstraint(
                condition=~models.Q(state="unbilled")
                | models.Q(owed__isnull=False, owed__gt=0),
                name="meterly_reservation_owed",
            ),
            models.CheckConstraint(
                # An open row without a lease, or a decided one without a next
                # attempt, would be invisible to the sweeper for ever.
                condition=(
                    models.Q(
                        state__in=["intent", "reserved"], lease_until__isnull=False
                    )
                    | models.Q(
                        state__in=["release_pending", "commit_pending", "unbilled"],
                        next_attempt_at__isnull=False,
                    )
                    # A late success that waits for another attempt.
                    | models.Q(state="released", next_attempt_at__isnull=False)
                    | models.Q(state="released", charge=None)
                    | models.Q(state__in=["denied", "failed", "conflict", "committed"])
                ),
                name="meterly_reservation_swept",
            ),
        ]
        indexes = [
            models.Index(fields=["lease_until"], name="meterly_reservation_lease"),
            models.Index(fields=["next_attempt_at"], name="meterly_reservation_due"),
            models.Index(fields=["created_at"], name="meterly_reservation_created"),
        ]

    #: The refusal of its debit, if this object has just tried it.
    shortage: MeterlyInsufficientCreditsError | None = None

    def __str__(self) -> str:
        return f"{self.reference} ({self.get_state_display()})"

    @property
    def is_presumed(self) -> bool:
        """Whether the handler has returned, and its response is not sent yet."""
        return self.state == self.State.RESERVED and self.charge is not None

    @property
    def is_noted(self) -> bool:
        """Whether the work succeeded late, and waits for another attempt's end."""
        return self.state == self.State.RELEASED and self.charge is not None

    @property
    def is_offered(self) -> bool:
        """Whether the work is offered, and nobody has claimed it yet."""
        return self.state == self.State.RESERVED and self.fence % 2 == 1

    def wire_key(self, operation: str) -> str:
        """Return the key of this attempt's ``reserve``, ``commit``, ... call.

        It begins with the customer's scope and can be taken apart from its end. So no
        two rows, and no two calls, share a key. For example,
        ``1f3a...:order-7~2:commit``.
        """
        key = self.customer.wire_scope + self.key_suffix(operation)
        assert len(key) <= MAX_KEY_LENGTH
        return key

    def key_suffix(self, operation: str) -> str:
        """Return the part of ``wire_key`` that follows the customer's scope."""
        return f":{self.key}~{self.attempt}:{operation}"


class LowBalance(models.Model):
    """The last time when a customer's low balance in one unit was announced."""

    customer = models.ForeignKey(
        Customer, verbose_name=_("customer"), on_delete=models.CASCADE
    )
    unit = ExactCharField(_("unit"), max_length=UNIT_LENGTH)
    announced_at = MomentField(_("announced at"), null=True)

    class Meta:
        verbose_name = _("low balance")
        verbose_name_plural = _("low balances")
        constraints = [
            models.UniqueConstraint(
                fields=["customer", "unit"], name="meterly_low_balance_once"
            )
        ]

    def __str__(self) -> str:
        return f"{self.customer}: {self.unit}"
