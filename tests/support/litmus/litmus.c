/*
 * Do fences and locked instructions of a guest hold against the host? Two tests on memory that both share, each played
 * by `guest` in the guest and by `host` on the host. Nothing of a C library is used: the same file runs in both.
 *
 * Store and load (Dekker's): in each round each side stores the round's number in its own word and then loads the other's.
 * With a fence in between, at least one of them sees the other's store. This is how the ends of a ring decide who
 * signals; a round in which neither sees the other is a wake-up that is lost.
 *
 * Increments: both sides count the same word up with locked additions; none may be lost.
 */
#include <stdatomic.h>
#include <stdint.h>

#define LINE 64 /* bytes of a cache line: words of different sides keep out of each other's way */

struct shared {
	_Alignas(LINE) _Atomic uint32_t guest_word;
	_Alignas(LINE) _Atomic uint32_t host_word;
	_Alignas(LINE) _Atomic uint32_t guest_ready; /* the round that the guest is ready for, and so on */
	_Alignas(LINE) _Atomic uint32_t host_ready;
	_Alignas(LINE) _Atomic uint32_t guest_done;
	uint32_t guest_loaded; /* belongs to the round that is done */
	_Alignas(LINE) _Atomic uint64_t counter;
	_Alignas(LINE) _Atomic uint64_t guest_added;
	_Alignas(LINE) _Atomic uint32_t guest_finished;
	_Alignas(LINE) _Atomic uint32_t stop; /* set by whoever has lost patience: both sides return */
};

struct result {
	uint64_t rounds, neither, both, only_guest, only_host;
	uint64_t guest_added, host_added, counter;
};

static int reached(struct shared *at, _Atomic uint32_t *word, uint32_t value)
{
	while (atomic_load(word) != value)
		if (atomic_load_explicit(&at->stop, memory_order_relaxed))
			return 0;
	return 1;
}

/*
 * The store and the fence in one: an exchange is a locked instruction on every x86, as the fences of Linux and of C
 * compilers are. (`mfence`, which few use, is a fence on every QEMU.)
 */
static uint32_t store_and_load(_Atomic uint32_t *own, uint32_t value, _Atomic uint32_t *other)
{
	atomic_exchange(own, value);
	return atomic_load(other);
}

void halt(struct shared *at)
{
	atomic_store(&at->stop, 1);
}

void guest(struct shared *at, uint32_t rounds, uint64_t increments)
{
	uint64_t added = 0;

	for (uint32_t round = 1; round <= rounds; round++) {
		atomic_store_explicit(&at->guest_ready, round, memory_order_release);
		if (!reached(at, &at->host_ready, round))
			break;
		at->guest_loaded = store_and_load(&at->guest_word, round, &at->host_word);
		atomic_store_explicit(&at->guest_done, round, memory_order_release);
	}
	while (added < increments && !atomic_load_explicit(&at->stop, memory_order_relaxed)) {
		atomic_fetch_add(&at->counter, 1);
		added++;
	}
	atomic_store(&at->guest_added, added);
	atomic_store(&at->guest_finished, 1);
}

void host(struct shared *at, uint32_t rounds, struct result *result)
{
	uint32_t random = 1;

	for (uint32_t round = 1; round <= rounds; round++) {
		if (!reached(at, &at->guest_ready, round))
			return;
		atomic_store_explicit(&at->host_ready, round, memory_order_release);
		/* The guest is slower, by how much is a matter of luck: look for the moment at which both store. */
		random = random * 1103515245 + 12345;
		for (volatile uint32_t delay = (random >> 16) % 120; delay; delay--)
			;
		int host_saw = store_and_load(&at->host_word, round, &at->guest_word) == round;
		if (!reached(at, &at->guest_done, round))
			return;
		int guest_saw = at->guest_loaded == round;
		if (guest_saw && host_saw)
			result->both++;
		else if (guest_saw)
			result->only_guest++;
		else if (host_saw)
			result->only_host++;
		else
			result->neither++;
		result->rounds++;
	}
	while (!atomic_load_explicit(&at->guest_finished, memory_order_acquire)) {
		if (atomic_load_explicit(&at->stop, memory_order_relaxed))
			return;
		atomic_fetch_add(&at->counter, 1);
		result->host_added++;
	}
	result->guest_added = atomic_load(&at->guest_added);
	result->counter = atomic_load(&at->counter);
}
