"""The customer mirror, the grants, and the journal of reservations."""

from __future__ import annotations

import hashlib
import uuid
from typing import TYPE_CHECKING, Any, cast

from django.conf import settings
from django.db import IntegrityError, connections, models, router, transaction
from django.utils.module_loading import import_string
from django.utils.translation import gettext_lazy as _

from .conf import meterly_settings
from .db import ExactCharField, MomentField, from_now
from .errors import MeterlyCustomerExistsError, MeterlyUnknownOutcomeError
from .transports.base import MAX_KEY_LENGTH, MAX_TEXT_LENGTH, check_text

if TYPE_CHECKING:
    from .client import MeterlyClient
    from .errors import MeterlyInsufficientCreditsError

#: A caller's key at most; the rest of the wire's 255 is for what is derived from it.
MAX_CALLER_KEY_LENGTH = 200
UNIT_LENGTH = 64
MAX_REASON_LENGTH = 500
ID_LENGTH = 64


class CustomerQuerySet(models.QuerySet["Customer"]):
    def for_owner(self, owner: models.Model) -> Customer:
        """Return the customer of *owner*, made on first use.

        Two first uses at once make one row. Raises ``ValueError`` when
        ``EXTERNAL_ID`` returns something that cannot be an external id.
        """
        external_id = import_string(meterly_settings.EXTERNAL_ID)(owner)
        check_text(external_id, "external_id")
        customer = self._known(external_id)
        if customer is None:
            customer, _ = self.get_or_create(
                external_id=external_id, defaults={"owner": cast(Any, owner)}
            )
        if customer.owner_id is None:
            # Known by its external id before its owner was.
            customer.owner = cast(Any, owner)
            customer.save(update_fields=["owner"])
        return customer

    def _known(self, external_id: str) -> Customer | None:
        # By hand: every guard asks this, and Django takes longer to write the query
        # anew than the database takes to answer it.
        self._for_write = True
        table = connections[self.db].ops.quote_name(Customer._meta.db_table)
        sql = f"SELECT * FROM {table} WHERE external_id = %s"  # noqa: S608
        return next(iter(self.raw(sql, [external_id])), None)

    def resolve(self, value: Any) -> Customer:
        """Return the customer that *value* stands for.

        *value* is a ``Customer``, an instance of ``CUSTOMER_MODEL`` or an
        external id. Raises ``TypeError`` for anything else.
        """
        if isinstance(value, Customer):
            return value
        if isinstance(value, str):
            check_text(value, "external_id")
            return self._known(value) or self.get_or_create(external_id=value)[0]
        owner_model = Customer._meta.get_field("owner").related_model
        if isinstance(value, owner_model):
            return self.for_owner(value)
        raise TypeError(
            "A customer is a Customer, an instance of "
            f"{meterly_settings.CUSTOMER_MODEL} or an external id, not {value!r}."
        )


class Customer(models.Model):
    """Who pays with credits: your external id, and the ledger's id for it."""

    owner = models.ForeignKey(
        meterly_settings.CUSTOMER_MODEL,
        verbose_name=_("owner"),
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
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

    def __str__(self) -> str:
        return str(self.external_id)

    @property
    def wire_scope(self) -> str:
        """What keeps this customer's keys apart from others' on the wire.

        The ledger's keys are unique in a workspace, a caller's keys only for
        one customer.
        """
        return hashlib.sha256(self.external_id.encode()).hexdigest()[:12]

    def register(self, client: MeterlyClient, unit: str) -> str:
        """Return the ledger's id, registering the customer there on first use.

        *unit* becomes the default unit of a new customer. Two first uses at
        once end with one customer: the ledger deduplicates by external id.
        Raises what ``create_customer`` raises, and ``MeterlyUnknownOutcomeError`` if
        the ledger names no id, or that of another customer.
        """
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
        """Keep *customer_id*, which the ledger says is this customer's.

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

    def forget_registration(self) -> None:
        """Let the next use register the customer again."""
        Customer.objects.filter(pk=self.pk, customer_id=self.customer_id).update(
            customer_id=None
        )
        self.customer_id = None


class Grant(models.Model):
    """Credits somebody granted: who, to whom, how many and why.

    Written before the ledger is asked, so that a grant whose answer was lost is
    asked for again, with the same key, until the ledger has said yes or no.
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
        return f"{self.amount} {self.unit} → {self.customer}"

    @property
    def wire_key(self) -> str:
        """The key of this grant's call: what makes the grant the one it is.

        Not the row's number, which a database may hand out again.
        """
        named = f"{self.unit}:{self.reference}".encode()
        digest = hashlib.sha256(named).hexdigest()[:32]
        return f"{self.customer.wire_scope}:{digest}:grant"


def _noted() -> models.Q:
    """Return the condition of ``Reservation.is_noted``."""
    return models.Q(state=Reservation.State.RELEASED, charge__isnull=False)


class ReservationQuerySet(models.QuerySet["Reservation"]):
    def lapsed(self, older_than: float = 0.0) -> ReservationQuerySet:
        """Open rows whose lease ran out *older_than* seconds ago or earlier.

        By the database's clock, as all that follows.
        """
        return self.filter(
            state__in=Reservation.State.open(), lease_until__lt=from_now(-older_than)
        )

    def on_trust(self) -> ReservationQuerySet:
        """Rows whose work runs or ran without a hold, and is not paid for yet.

        Also one whose lease has lapsed, for its work may still succeed, and every
        debt.
        """
        state = Reservation.State
        running = models.Q(state__in=[state.RESERVED, state.COMMIT_PENDING])
        lapsed = models.Q(state=state.RELEASE_PENDING, lapsed=True)
        unheld = models.Q(reservation_id=None) | models.Q(reservation_id="")
        return self.filter((running | lapsed) & unheld | models.Q(state=state.UNBILLED))

    def debts(self) -> ReservationQuerySet:
        """Rows whose charge there were too few credits for, the oldest first."""
        unbilled = self.filter(state=Reservation.State.UNBILLED)
        return unbilled.order_by("decided_at", "pk")

    def due(self, older_than: float = 0.0) -> ReservationQuerySet:
        """Decided rows that are to be carried out, since *older_than* seconds.

        And late successes that wait for what becomes of another attempt.
        """
        return self.unsettled().filter(
            stuck_at=None, next_attempt_at__lte=from_now(-older_than)
        )

    def unsettled(self) -> ReservationQuerySet:
        """Decided rows that are to be carried out, and late successes that wait."""
        pending = models.Q(state__in=Reservation.State.pending())
        return self.filter(_noted() | pending)

    def settled(self, older_than: float = 0.0) -> ReservationQuerySet:
        """Final rows, since *older_than* seconds: there is nothing left to do."""
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
    """One attempt at one guarded piece of work, from before the first byte on.

    The journal's row: what was asked of the ledger, and what was decided.
    ``django_meterly.journal`` is its only writer.
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
            """Nobody has decided yet; the row has a lease."""
            return (cls.INTENT, cls.RESERVED)

        @classmethod
        def pending(cls) -> tuple[Reservation.State, ...]:
            """Decided, and to be carried out at the ledger."""
            return (cls.RELEASE_PENDING, cls.COMMIT_PENDING, cls.UNBILLED)

        @classmethod
        def final(cls) -> tuple[Reservation.State, ...]:
            """Nothing is left to be done."""
            return (cls.DENIED, cls.FAILED, cls.RELEASED, cls.CONFLICT, cls.COMMITTED)

        @classmethod
        def charged(cls) -> tuple[Reservation.State, ...]:
            """The credits are spent, or owed."""
            return (cls.COMMIT_PENDING, cls.COMMITTED, cls.UNBILLED, cls.CONFLICT)

        @classmethod
        def free(cls) -> tuple[Reservation.State, ...]:
            """Nothing was charged; the key may be tried again."""
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

    #: Why its debit was refused, if this very object has just tried it.
    shortage: MeterlyInsufficientCreditsError | None = None

    def __str__(self) -> str:
        return f"{self.reference} ({self.get_state_display()})"

    @property
    def is_presumed(self) -> bool:
        """Whether the work has returned well, and its response is not sent yet."""
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

        Built so that it can be taken apart again from its end, and begins with
        the customer's scope: no two rows, and no two calls, can share one.
        """
        key = f"{self.customer.wire_scope}:{self.key}~{self.attempt}:{operation}"
        assert len(key) <= MAX_KEY_LENGTH
        return key


class LowBalance(models.Model):
    """When somebody was told last that a customer's credits run low."""

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
