import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.regex.Pattern;

/**
 * Starts a command the way the platform's back end does: ProcessBuilder, stderr merged into stdout, read line by
 * line; Process.destroy() to stop it, destroyForcibly() five seconds later.
 *
 * java PlatformLauncher.java STOP_PATTERN DELAY_MS COMMAND…   (an empty pattern: never stop it)
 *
 * Prints `LINE <ms since start> <text>` for every line as it arrives and `EXIT <code> <ms since destroy or -1>
 * <forced>`. Lines end at \n alone, so that a carriage return in the text is seen.
 */
public class PlatformLauncher {
    public static void main(String[] words) throws Exception {
        Pattern stopAt = words[0].isEmpty() ? null : Pattern.compile(words[0]);
        long delay = Long.parseLong(words[1]);
        List<String> command = Arrays.asList(words).subList(2, words.length);
        ProcessBuilder builder = new ProcessBuilder(command);
        builder.redirectErrorStream(true);
        long started = System.nanoTime();
        Process process = builder.start();
        long[] destroyed = {-1};
        boolean[] forced = {false};
        InputStream output = process.getInputStream();
        java.io.ByteArrayOutputStream line = new java.io.ByteArrayOutputStream();
        int value;
        while ((value = next(output)) >= 0) {
            if (value != '\n') {
                line.write(value);
                continue;
            }
            String text = line.toString(StandardCharsets.UTF_8);
            line.reset();
            say("LINE " + millis(started) + " " + text);
            if (stopAt != null && destroyed[0] < 0 && stopAt.matcher(text).find()) {
                Thread.sleep(delay);
                destroyed[0] = System.nanoTime();
                process.destroy();
                Thread killer = new Thread(() -> kill(process, forced));
                killer.setDaemon(true);
                killer.start();
            }
        }
        int code = process.waitFor();
        long took = destroyed[0] < 0 ? -1 : millis(destroyed[0]);
        say("EXIT " + code + " " + took + " " + forced[0]);
    }

    /** The next byte; -1 at the end, and after destroy(), which closes the stream on our side. */
    static int next(InputStream output) {
        try {
            return output.read();
        } catch (java.io.IOException closed) {
            return -1;
        }
    }

    static void kill(Process process, boolean[] forced) {
        try {
            if (!process.waitFor(5, TimeUnit.SECONDS)) {
                forced[0] = true;
                process.destroyForcibly();
            }
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
        }
    }

    static long millis(long since) {
        return (System.nanoTime() - since) / 1_000_000;
    }

    static void say(String text) {
        byte[] bytes = (text + "\n").getBytes(StandardCharsets.UTF_8);
        System.out.write(bytes, 0, bytes.length);
        System.out.flush();
    }
}
