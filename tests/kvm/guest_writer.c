/* Writes numbered, checksummed records to two files or disks in strict alternation, each durable before the next.
 *
 * guest_writer A B SLOTS PAUSE_US: record n goes to slot n % SLOTS of A, then to the same slot of B, n = 1, 2, ...
 * A record is 4096 bytes: "GRAINREC", n, a checksum of what follows, then bytes that follow from n. So whoever looks
 * at both at one instant sees n on A without n on B, or both; never n on B without n on A.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RECORD 4096

static uint64_t checksum(const unsigned char *data, size_t size)
{
    uint64_t sum = 0xcbf29ce484222325ULL; /* FNV-1a */
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word;
        memcpy(&word, data + i, 8);
        sum = (sum ^ word) * 0x100000001b3ULL;
    }
    return sum;
}

int main(int argc, char **argv)
{
    if (argc != 5) return 2;
    int fds[2] = {open(argv[1], O_RDWR | O_DSYNC), open(argv[2], O_RDWR | O_DSYNC)};
    if (fds[0] < 0 || fds[1] < 0) { perror("open"); return 1; }
    uint64_t slots = strtoull(argv[3], NULL, 10);
    useconds_t pause = strtoul(argv[4], NULL, 10);
    static unsigned char record[RECORD] __attribute__((aligned(4096)));
    for (uint64_t n = 1;; n++) {
        uint64_t seed = n * 0x9e3779b97f4a7c15ULL;
        memcpy(record, "GRAINREC", 8);
        memcpy(record + 8, &n, 8);
        for (size_t i = 24; i < RECORD; i += 8) {
            seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
            memcpy(record + i, &seed, 8);
        }
        uint64_t sum = checksum(record + 24, RECORD - 24);
        memcpy(record + 16, &sum, 8);
        for (int disk = 0; disk < 2; disk++)
            if (pwrite(fds[disk], record, RECORD, (off_t)(n % slots) * RECORD) != RECORD) { perror("pwrite"); return 1; }
        if (pause) usleep(pause);
    }
}
