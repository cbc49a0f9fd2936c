// What processes of one machine add up, in memory that they share.
//
// Each writes what it has into a slot of its own and counts that call in a line of its own; then it
// waits until the lines of all others say that they came as far. There are two slots of each: who
// writes into one for the next but one call has seen the others come to the one between, and so they
// have read what lay there before.
#pragma once
#include <fcntl.h>
#include <immintrin.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>

#include "rows.h"
#include "span.h"

namespace quintet {

// Waiting for a process that computes takes microseconds, for one whose core is taken a time slice.
constexpr int SPINS = 2000, YIELDS = 2000;
constexpr i64 LINE = 64, LOOKS = 20'000'000;  // nanoseconds between two looks for who is gone

struct SharedBuffer {
    QUINTET_FIELDS(memory, left, index, count, slot, patience, file)
    Span<char> memory;  // the lines of all, then two slots of each
    Span<i64> left;     // (2): 1 + who did not come, or 0; and whether that process has ended
    i64 index, count, slot;
    i64 patience;  // in nanoseconds
    i64 file;      // of which each process holds a lock on its byte while it lives

    bool given() const { return count > 0; }
    bool fits() const {
        return count > 0 && index >= 0 && index < count && slot > 0 && slot % LINE == 0 && patience > 0 &&
               memory.holds(count * (LINE + 2 * slot)) && left.holds(2);
    }

    // x becomes the sum of all processes' x, added in their order; false where one did not come.
    template <class T>
    bool sum(T* x, i64 n) const {
        return each_slot(n, sizeof(T), [&](i64 from, i64 some, auto&& of) {
            std::copy_n(x + from, some, reinterpret_cast<T*>(of(index)));
            return [&, from, some](auto&& read) {
                if constexpr (std::is_same_v<T, bf16> || std::is_same_v<T, float>) {
                    each_vector<T>(some, [&](i64 i, auto last) {
                        F all = get(reinterpret_cast<const T*>(read(0)), i, some, last);
                        for (i64 p = 1; p < count; ++p)
                            all = quintet::add(all, get(reinterpret_cast<const T*>(read(p)), i, some, last));
                        set(x + from, i, some, all, last);
                    });
                } else {
                    for (i64 i = 0; i < some; ++i) {
                        T all = reinterpret_cast<const T*>(read(0))[i];
                        for (i64 p = 1; p < count; ++p) all += reinterpret_cast<const T*>(read(p))[i];
                        x[from + i] = all;
                    }
                }
            };
        });
    }

    // y (count, n) becomes what all processes have, n bytes each.
    bool gather(const char* x, char* y, i64 n) const {
        return each_slot(n, 1, [&](i64 from, i64 some, auto&& of) {
            std::copy_n(x + from, some, of(index));
            return [&, from, some](auto&& read) {
                for (i64 p = 0; p < count; ++p) std::copy_n(read(p), some, y + p * n + from);
            };
        });
    }

  private:
    std::atomic<i64>& line(i64 of) const { return *reinterpret_cast<std::atomic<i64>*>(memory.p + of * LINE); }

    template <class Fn>
    bool each_slot(i64 n, i64 size, Fn&& write) const {
        for (i64 from = 0; from < n; from += slot / size) {
            if (left.p[0]) return false;
            const i64 some = std::min(slot / size, n - from);
            const i64 call = line(index).load(std::memory_order_relaxed) + 1;
            const auto of = [&](i64 p) { return memory.p + count * LINE + ((call & 1) * count + p) * slot; };
            const auto read = write(from, some, of);
            line(index).store(call, std::memory_order_release);
            for (i64 p = 0; p < count; ++p)
                if (p != index && !came(p, call)) return false;
            read(of);
        }
        return true;
    }

    bool came(i64 of, i64 call) const {
        const auto there = [&] { return line(of).load(std::memory_order_acquire) >= call; };
        for (int i = 0; i < SPINS; ++i) {
            if (there()) return true;
            _mm_pause();
        }
        const i64 began = now();
        i64 looked = began;
        for (i64 round = 0; !there(); ++round) {
            if (round < YIELDS) {
                sched_yield();
            } else {
                const timespec rest{0, round < 2 * YIELDS ? 50'000 : 500'000};
                nanosleep(&rest, nullptr);
            }
            if (round % 16) continue;
            const i64 time = now();
            if (time - looked > LOOKS) {
                looked = time;
                // What it wrote last may have come meanwhile.
                if (gone(of) && !there()) return absent(of, true);
            }
            if (time - began > patience) return absent(of, false);
        }
        return true;
    }

    bool absent(i64 of, bool ended) const {
        left.p[0] = of + 1;
        left.p[1] = ended;
        return false;
    }

    // The system gives back the locks of a process that has ended, in whatever way.
    bool gone(i64 of) const {
        struct flock lock {};
        lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = of, lock.l_len = 1;
        return fcntl(int(file), F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
    }

    static i64 now() {
        timespec time{};
        clock_gettime(CLOCK_MONOTONIC, &time);
        return time.tv_sec * 1'000'000'000 + time.tv_nsec;
    }
};

}  // namespace quintet
